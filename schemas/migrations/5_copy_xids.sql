-- Earlier versions copied a table when no older transaction was open: all of what came before copy_lsn is in the copy.
ALTER TABLE _rhei.tables ADD COLUMN copy_xids VARCHAR;
