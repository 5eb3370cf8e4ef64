"""What all streaming steps share: Ray Data streams, durable parts, columns, images, memory, quarantine."""
