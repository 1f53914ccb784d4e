"""Fine-tuning: configuration, recipes, loaders, loss, trainer and run directory."""
