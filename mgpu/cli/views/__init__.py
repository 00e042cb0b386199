"""What people see: values turned into lines and tables. Nothing here prints."""
