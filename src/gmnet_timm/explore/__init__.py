"""The page of `gmnet-timm freq explore`: move the radius, and watch pictures and answers change."""
