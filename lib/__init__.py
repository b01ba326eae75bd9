"""What the notebooks share: models, attacks, schedules, training and the measurements of the paper."""
