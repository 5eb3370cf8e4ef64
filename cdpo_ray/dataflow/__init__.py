"""Shared by all streaming steps: Ray Data streams, durable parts, columns, images, memory, quarantine."""
