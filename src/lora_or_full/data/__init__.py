"""From files in SQuAD's format to tokenized questions in batches."""
