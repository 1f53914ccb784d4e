"""Studies over several runs: ablation, transfer, robustness, recipes, GPU sessions, the demo."""
