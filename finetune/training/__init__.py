"""One run from config to adapter: set-up, the trainer, when it saves and stops, its record, and how it goes on."""
