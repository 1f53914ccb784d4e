"""Any model of timm or the zoo, opened and checked."""
