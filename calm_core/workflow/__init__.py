"""The stages from text to text as one command."""
