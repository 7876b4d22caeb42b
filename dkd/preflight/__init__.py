"""Why a recipe is refused, before anything starts."""
