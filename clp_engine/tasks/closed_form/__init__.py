"""Problems whose optimum is known in closed form."""
