"""Files whose layout other projects define, one file per format."""
