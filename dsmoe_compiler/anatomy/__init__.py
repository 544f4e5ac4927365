"""What a layer was before the passes and what it became, as plain data: its values, their roles, its text."""
