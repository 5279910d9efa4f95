"""Everything drawn: pictures, films, Markdown tables and HTML pages."""
