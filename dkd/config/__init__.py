"""Define the recipe: its schema, loading with overrides, and messages for wrong input."""

from dkd.config.changes import recipe_changes
from dkd.config.loading import load_recipe, parse_overrides, recipe_to_yaml
from dkd.config.messages import Problem, RecipeError
from dkd.config.schema import Recipe

__all__ = ["Problem", "Recipe", "RecipeError", "load_recipe", "parse_overrides", "recipe_changes", "recipe_to_yaml"]
