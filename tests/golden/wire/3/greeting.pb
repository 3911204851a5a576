
2
greeting"&

version

hospital	*st-mary