"""The coordinator: who is a member, who does what, and where the run stands. It carries no tensor and never loads torch."""
