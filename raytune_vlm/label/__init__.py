"""Labels for images that have none, made by teachers, compared, and reviewed by people."""
