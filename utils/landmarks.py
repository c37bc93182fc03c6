"""The landmarks of a face: left eye, right eye, nose, left mouth corner, right mouth corner, as seen in the image."""

LANDMARKS_PER_FACE = 5
# Left and right of a mirrored face change places: eyes and mouth corners, not the nose.
MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]
