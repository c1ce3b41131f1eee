"""Training: supervised finetuning and multi-objective finetuning."""
