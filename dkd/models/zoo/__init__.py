"""Build models for small images as their papers and public implementations do."""
