"""Text to tokens and logits to tokens: tokenizer, chat templates, sampling, grammars."""
