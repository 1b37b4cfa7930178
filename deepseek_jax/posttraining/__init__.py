"""After pre-training (report section 5): reinforcement learning with rewards that rules decide."""
