"""The ``automodel`` command: one small file per verb, imported when the verb is used."""
