"""What ``scripts/survey_models.py`` is made of."""
