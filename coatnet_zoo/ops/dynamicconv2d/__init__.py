"""DynamicConv in two dimensions: one kernel a head and position, predicted from the input at that position."""
