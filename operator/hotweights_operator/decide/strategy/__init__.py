"""How pods move to a version: which of them may (`canary`), how many at once
(`disruption_budget`), and what each is told (`activation`).
"""
