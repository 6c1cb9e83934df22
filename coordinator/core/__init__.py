"""Pure: events with `now` in, effects and answers out."""
