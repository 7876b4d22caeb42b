"""`dkd new`: write a recipe for a teacher, a student and images. `dkd distill` writes it too, and trains it."""
