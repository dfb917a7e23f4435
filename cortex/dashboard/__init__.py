"""The operators' page: its files, and the one event stream that feeds it."""
