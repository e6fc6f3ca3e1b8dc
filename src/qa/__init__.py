"""Question answering as sequences: prompt, model, decoding, scoring. Plain torch and Python."""
