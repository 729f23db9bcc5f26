"""The driving side: decides when to validate, save and stop, and holds the workers together."""
