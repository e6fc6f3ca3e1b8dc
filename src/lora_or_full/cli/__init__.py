"""The command `lora-or-full`: ask, page, report, evaluate, export."""
