"""Client languages: body bytes to request, events to replies, errors to envelopes."""
