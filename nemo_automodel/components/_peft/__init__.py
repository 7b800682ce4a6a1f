"""Parameter-efficient fine-tuning: LoRA and DoRA adapters, matched by name and saved as PEFT adapters."""
