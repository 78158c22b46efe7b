"""Objects by URL: S3, Google Cloud Storage, Azure, the Hugging Face Hub and web servers."""
