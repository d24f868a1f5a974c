"""A tokenizer class of its own."""

from transformers import PreTrainedTokenizerFast


class SmallTokenizer(PreTrainedTokenizerFast):
    pass
