"""Results for people: tables (Rich), plots (matplotlib), one self-contained HTML page."""
