"""What a reader sees: findings, tables, pictures, advice and the page."""
