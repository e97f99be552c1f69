"""What a decision sees and what it can ask for: values, no I/O, no clock. Imports the custom
resources' models.
"""
