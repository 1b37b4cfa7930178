"""What a model costs, and what it would cost on machines that are not here."""
