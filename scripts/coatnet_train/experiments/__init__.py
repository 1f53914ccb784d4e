"""Studies over many runs: ablation, transfer, robustness, recipes, the demo."""
