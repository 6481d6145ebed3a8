"""The teacher of a distillation: what is known of it before its weights are, the model beside the student, and what it
said, kept on disk."""
