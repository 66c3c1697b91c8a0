"""Collections over HTTP, as OpenAI's API: models, answers, embeddings, files and vector stores."""
