"""After pre-training (report section 5): preference pairs, distillation and reinforcement learning."""
