"""What LoRA costs and gains against full fine-tuning on question answering."""
