"""Client APIs: body bytes to request, events to replies, errors to envelopes; a package each."""
