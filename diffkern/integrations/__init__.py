"""Other libraries' models and schedulers on diffkern's ops. Each is imported only when it is asked for."""
