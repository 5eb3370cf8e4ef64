"""What all pages share: chart style, HTML shell, figures as SVG."""
