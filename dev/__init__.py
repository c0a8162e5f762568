"""Tools of the developers: none of them is part of the package."""
