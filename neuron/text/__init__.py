"""Between text and token ids: templates, tokenizers, and events from ids."""
