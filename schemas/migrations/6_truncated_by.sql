-- Without the xid of a TRUNCATE a new file of the table at the source is explained by another copy.
ALTER TABLE _rhei.tables ADD COLUMN truncated_by UINTEGER;
