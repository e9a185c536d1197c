"""Model folders: where they come from, how they are loaded, what they say of a text."""

from kvpipe import lazily

__getattr__ = lazily(__name__, load_model="folders", load_tokenizer="folders")
